"""From a method to places in a model: which sites there are, and which experts of which rank each of them gets."""
