"""One module a stage, each with `run(config, out) -> metrics`: the recipe, top to bottom."""
