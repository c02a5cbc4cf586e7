"""Those who follow a training run: hooks of anyone's, and MLflow and Weights & Biases by them. Needs neither torch nor Ray."""
