"""The parts of ``train_moe_lm.py`` and ``serve_moe.py``: text, model, training, serving, times."""
