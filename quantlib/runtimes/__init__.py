"""What opens and runs an exported model: the runtimes and int8 engines of this machine."""
