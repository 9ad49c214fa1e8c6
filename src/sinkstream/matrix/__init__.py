"""A matrix of points (model × text × policy × backend): one record a point, resumable; run on one machine or on Ray."""
