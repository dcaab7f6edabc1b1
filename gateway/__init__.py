"""The broker process: MQTT in, the log, the command line."""

__version__ = "0.1.0"
