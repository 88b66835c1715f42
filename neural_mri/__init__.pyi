from neural_mri.client import Client as Client

__version__: str
