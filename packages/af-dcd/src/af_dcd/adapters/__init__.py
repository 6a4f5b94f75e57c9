"""The host libraries that the method is brought to, a folder for each."""
