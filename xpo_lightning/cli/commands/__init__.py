"""Commands besides training: one file each, with a function of the same name whose signature is the command line."""
