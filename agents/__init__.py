"""The Faust steps, one file each: predict, store, archive.

`app.py` runs a step as a process, `delivery.py` decides what is acknowledged, `consumer.py` is the bridge
to Faust. A step sees `Delivery.take`, `Delivered.claim` and `Delivered.finish`, and nothing of Kafka.
"""
