"""Building blocks of Millrace; no Faust, no FastAPI.

How an event flows:

    Kafka client, gateway, `millrace publish`
        └─> images.realtime.v1 / images.bulk.v1      events.decode_image
              ├─> predict  ledger -> imaging -> batching -> models -> predictions.v1 | dead-letters.v1
              └─> archive  the `images` row; inline bytes to the object store
    predictions.v1, dead-letters.v1
        └─> store    PostgreSQL: predictions, embeddings, dead letters
"""
