"""The pages of the experiments: text and figures, made from the results alone."""
