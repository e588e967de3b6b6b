"""Who owns which samples: one file for each way to divide a data set among clients."""
