"""How the zoo's trained models were trained: `python -m interp.zoo.training.train_induction --out weights/`."""
