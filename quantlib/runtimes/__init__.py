"""The runtimes and int8 engines of this machine, which open and run exported models."""
