"""The wheel and the Debian package, installed as operators install them: `make test-packages`."""
