"""How the embedded data, tokenizer and model were made; the wheel has the results."""
