"""The reproducible studies and the expert zoos they run on."""
