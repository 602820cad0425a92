"""From what a GHN decodes to the parameters of a model."""
