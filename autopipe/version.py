"""The version, read by the command line and by the build."""

__version__ = "0.1.0"
