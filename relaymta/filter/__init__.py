"""2. What is done to a message on its way in: it is signed here, once, before it is made safe."""
