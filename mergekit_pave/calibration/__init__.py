"""From a data set to one covariance per layer: data -> samples -> batches -> model -> covariances."""
