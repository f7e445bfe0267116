"""Imports what the commands import, once, in the server that every attacked run is forked from."""

import importlib

for _name in (
    "h5py numba pandas pyarrow.parquet sklearn.neighbors tifffile torch torch._dynamo torch.utils.tensorboard yaml "
    "cellfast.cli.embed cellfast.cli.evaluate cellfast.cli.info cellfast.cli.ingest cellfast.cli.profile cellfast.cli.train "
    "cellfast.embedding.embed cellfast.export cellfast.profiles.build "
    "cellfast.profiles.report cellfast.screens.ingest_crops cellfast.screens.ingest_fields cellfast.screens.keep_fields "
    "cellfast.screens.label_masks cellfast.screens.summary cellfast.training.loop"
).split():
    importlib.import_module(_name)
importlib.import_module("torch").set_num_threads(1)
