"""Stands in for rules_python where it cannot be downloaded: the rules that Bazel 4 brings itself."""

py_library = native.py_library
py_test = native.py_test
