"""One unit from start to receipt; knows no Ray, so `LocalPool` and Ray actors run the same code."""
