"""Diagnoses in continuous integration: templates, and what they run beside the command line."""
