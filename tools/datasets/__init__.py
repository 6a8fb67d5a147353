"""What pack_dataset, split_dataset and prepare_digits are made of."""
