"""Where calibration rows come from: files, data sets, the model itself."""
