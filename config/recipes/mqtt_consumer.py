"""Takes readings from a topic and ignores old epochs: ``mqtt_consumer.py PORT TOPIC FENCE_FILE OUTPUT``.

Messages are JSON, with the sender's FAILOVER_EPOCH: {"epoch": 7, "value": 20.5}.
"""

import json
import sys
from pathlib import Path

import paho.mqtt.client as paho
from fence import Fence

port, topic, fence_file, output_file = sys.argv[1:]
fence = Fence(Path(fence_file))


def on_message(_client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
    """Write the reading, or log that it is late."""
    reading = json.loads(message.payload)
    if fence.admits(reading["epoch"]):
        output.write(f"{reading['value']}\n")
    else:
        sys.stderr.write(f"ignored epoch={reading['epoch']} newest={fence.newest}\n")


client = paho.Client(paho.CallbackAPIVersion.VERSION2)
client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
client.on_message = on_message
client.connect("127.0.0.1", int(port))
with Path(output_file).open("a", buffering=1) as output:
    client.loop_forever()
