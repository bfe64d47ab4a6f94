"""What a pipeline looks like to a person."""
