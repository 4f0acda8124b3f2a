"""The library that the stage scripts share; see docs/design.md for which module does what."""
