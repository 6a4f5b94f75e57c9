"""Reading of training data: captions, labelled images, texts, and the order of batches."""
