"""From folders and timm's data sets to batches."""
