"""The natural gradient: the step that its methods share, the rules that bound it, and how each holds F."""
