"""Plans a deployment: compiles a model's step for devices that are not here, and adds up."""
