"""The scanner: a model and a request in, Arrow tables out.

It knows torch, TransformerLens and the contract. It knows no queue, no database, no HTTP, no file but the
model's own, and it never changes a weight.
"""

import os

# All are read when the libraries are first imported, so they are set before any module of ours does it.
# A worker reads the model store alone: no name is ever looked up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
