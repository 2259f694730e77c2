"""The registry of check kinds and progress sources: one line for each, beside its own file.

A kind's class declares its keys as a setting is declared (fields.py), and its file implements it.
"""

from agent.schema.fields import Tables

CHECKS = Tables(
    "check",
    "a check",
    {
        "exec": "agent.drivers.checks.command:ExecCheck",
        "http": "agent.drivers.checks.http:HttpCheck",
        "tcp": "agent.drivers.checks.tcp:TcpCheck",
        "file_age": "agent.drivers.checks.file_age:FileAgeCheck",
        "process": "agent.drivers.checks.process:ProcessCheck",
        "prometheus": "agent.drivers.checks.prometheus:PrometheusCheck",
    },
    most=64,  # each is a task that runs every few seconds; what matters on a host fits into fewer
)

PROGRESS = Tables(
    "progress",
    "a source",
    {
        "socket": "agent.drivers.progress.unix_socket:SocketProgress",
        "file_time": "agent.drivers.progress.file:FileTimeProgress",
        "file": "agent.drivers.progress.file:FileProgress",
        "metric": "agent.drivers.progress.metric:MetricProgress",
        "mqtt": "agent.drivers.progress.mqtt:MqttProgress",
        "command": "agent.drivers.progress.command:CommandProgress",
    },
)

MQTT = Tables("mqtt", "the table [mqtt]", {"": "agent.schema.mqtt:Mqtt"})
