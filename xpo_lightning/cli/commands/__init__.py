"""Commands beside training: a file each, and a function of the same name, whose signature is the command line."""
