"""Neural MRI: images of the inside of an open-weight language model.

The library every process and every user stands on. `contract` says what things are, `backing` keeps
them, `client` and `cli` are the ways in. It knows nothing of torch.
"""

__version__ = "0.1.0"
