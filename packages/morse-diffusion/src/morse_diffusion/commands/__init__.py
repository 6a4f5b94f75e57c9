"""The commands, one file each, named for its verb."""
