"""Reading a Postfix configuration, for `relaymta import postfix`: pure but for the files that it names, which are read once."""
