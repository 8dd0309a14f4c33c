"""Building blocks of Millrace; no Faust, no FastAPI.

How an event flows:

    Kafka client, gateway, `millrace publish`
        └─> images.realtime.v1 / images.bulk.v1      events.decode_image
              ├─> predict  ledger -> imaging -> batching -> models -> predictions.v1 | dead-letters.v1
              └─> archive  the `images` row; inline bytes to the object store
    predictions.v1, dead-letters.v1
        └─> store    PostgreSQL: predictions, embeddings, dead letters
"""

import os

# OpenMP threads that wait must sleep. By default they spin, and wherever other processes want the same cores
# (a broker and other steps on one machine, a CPU limit in a container) a forward pass then waits for threads
# that wait for it: 2 cores with a load of 7 did 12 pictures a second, and do 140 so. On idle cores it costs
# nothing that could be measured. Here, because libgomp reads it once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN makes code of each convolution for each size of a batch, and keeps 1,024 of them: mobilenet_v3_small in
# batches of 1 to 32 has 1,700, made them again and again, and took 3.2 ms of a pass for a picture instead of 2.2.
# Each is 150 kB or so. Read at the first pass.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
