"""One file a consumer: `run(model, feeds, folder, outputs)` converts and runs a model in it."""
