"""Activations on integers: QDQ nodes with ranges from data, and products whose inputs are rounded when they come."""
