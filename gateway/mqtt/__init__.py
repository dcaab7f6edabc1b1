"""MQTT 3.1, 3.1.1 and 5.0 on the wire, without any input or output.

`connection` turns what a socket read into events and is the hot path; `packets` holds one frozen object per packet with
`encode` and `decode`; `properties` and `reasons` are the tables of the 5.0 standard; `wire` its data types; `errors` what
bytes can do wrong. Nothing here knows of sockets, time, loops or databases.

Invariant: for any bytes whatever, decoding ends in a packet, in "need more", or in an `errors.MqttError` that says why.
"""
