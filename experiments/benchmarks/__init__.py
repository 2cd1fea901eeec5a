"""What cqjax costs beside other optimizers and other routes: ``python -m experiments bench``."""
