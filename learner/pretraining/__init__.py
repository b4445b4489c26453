"""Making small base models on MiniMath text: recipe, tokenizer, corpus, packing, training loop, probe."""
