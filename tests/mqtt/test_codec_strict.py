"""What the two standards forbid, packet by packet in the order of chapter 3, and what they permit at the edge.

Each case names protocol level, receiving side, bytes, error class and reason. It is fed whole and byte by byte: the error must
be the same. Clauses are of 5.0 unless marked; where 3.1.1 has its own number, the case of level 4 names it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from tidegate.gateway.mqtt.connection import CLIENT, SERVER, Connection, Side
from tidegate.gateway.mqtt.errors import MalformedPacket, MqttError, ProtocolError
from tidegate.gateway.mqtt.properties import Property, decode_block
from tidegate.gateway.mqtt.reasons import ReasonCode

from .ends import fault_of, fresh, opened


class Bad(NamedTuple):
    """Bytes that must be refused."""

    id: str
    version: int
    side: Side
    wire: str
    error: type[MqttError] = MalformedPacket
    reason: ReasonCode | None = None


class Good(NamedTuple):
    """Bytes that look wrong and are not."""

    id: str
    version: int
    side: Side
    wire: str


P = ProtocolError
R = ReasonCode
S, C = SERVER, CLIENT
MQTT4, MQTT5 = "0004 4d515454 04", "0004 4d515454 05"
TOO_NEW = R.UNSUPPORTED_PROTOCOL_VERSION

FIXED_HEADER = [
    Bad("type 0 is forbidden, table 2-1", 5, S, "0000", P),
    Bad("AUTH does not exist in 3.1.1, table 2.1", 4, S, "f000", P),
    Bad("remaining length of five bytes, 1.5.5", 4, S, "c0 8080808000"),
    Bad("remaining length longer than needed [MQTT-1.5.5-1]", 5, S, "c0 8000"),
    Bad("PUBLISH with a length longer than needed [MQTT-1.5.5-1]", 5, S, "30 8500 0001 61 00 78"),
    Bad("PUBLISH with a length of five bytes, 1.5.5", 4, S, "30 8080808001"),
    Bad("PUBREL with flags 0000 [MQTT-2.1.3-1], [MQTT-3.6.1-1]", 4, S, "6002 0001"),
    Bad("SUBSCRIBE with flags 0000 [MQTT-3.8.1-1]", 4, S, "8006 0001 0001 61 00"),
    Bad("UNSUBSCRIBE with flags 0011 [MQTT-3.10.1-1]", 5, S, "a306 0001 00 0001 61"),
    Bad("PUBACK with flags 0010 [MQTT-2.1.3-1]", 4, S, "4202 0001"),
    Bad("PUBREC with flags 0001 [MQTT-2.1.3-1]", 5, S, "5102 0001"),
    Bad("PUBCOMP with flags 1000 [MQTT-2.1.3-1]", 5, S, "7802 0001"),
    Bad("PINGREQ with flags 0001 [MQTT-2.1.3-1]", 4, S, "c100"),
    Bad("DISCONNECT with flags 0001 [MQTT-3.14.1-1]", 5, S, "e100"),
    Bad("AUTH with flags 0001 [MQTT-3.15.1-1]", 5, S, "f100"),
    Bad("SUBACK with flags 0010 [MQTT-2.1.3-1]", 5, C, "9204 0001 00 00"),
    Bad("SUBSCRIBE sent by a server, table 2-1", 5, C, "8207 0001 00 0001 61 00", P),
    Bad("PINGREQ sent by a server, table 2-1", 4, C, "c000", P),
    Bad("CONNACK sent by a client, table 2-1", 5, S, "2003 000000", P),
    Bad("SUBACK sent by a client, table 2-1", 4, S, "9003 0001 00", P),
    Bad("UNSUBACK sent by a client, table 2-1", 4, S, "b002 0001", P),
    Bad("PINGRESP sent by a client, table 2-1", 4, S, "d000", P),
    Bad("DISCONNECT sent by a 3.1.1 server, table 2.1", 4, C, "e000", P),
]

FIRST = [
    Bad("first is PUBLISH [MQTT-3.1.0-1]", 0, S, "3003 0001 61", P),
    Bad("first is PINGREQ [MQTT-3.1.0-1]", 0, S, "c000", P),
    Bad("first is HTTP", 0, S, "47455420 2f204854 54502f31", P),
    Bad("first is TLS", 0, S, "16030100 c8010000", P),
    Bad("first from a server is PUBLISH [MQTT-3.2.0-1]", -4, C, "3003 0001 61", P),
    Bad("a second CONNECT [MQTT-3.1.0-2]", 4, S, f"100c {MQTT4} 02 0000 0000", P),
    Bad("a second CONNACK [MQTT-3.2.0-2]", 5, C, "2003 000000", P),
]

CONNECT = [
    Bad("CONNECT with flags 0001 [MQTT-3.1.0-1]", 0, S, f"110c {MQTT4} 02 0000 0000", P),
    Bad("protocol name in small letters [MQTT-3.1.2-1]", 0, S, "100c 0004 6d717474 04 02 0000 0000", P, TOO_NEW),
    Bad("protocol name MQTTX [MQTT-3.1.2-1]", 0, S, "100d 0005 4d51545458 04 02 0000 0000", P, TOO_NEW),
    Bad("empty protocol name [MQTT-3.1.2-1]", 0, S, "1008 0000 04 02 0000 0000", P, TOO_NEW),
    Bad("level 6 [MQTT-3.1.2-2]", 0, S, "100d 0004 4d515454 06 02 0000 00 0000", P, TOO_NEW),
    Bad("level 3 under the new name [MQTT-3.1.2-2]", 0, S, "100c 0004 4d515454 03 02 0000 0000", P, TOO_NEW),
    Bad("level 4 under the old name [MQTT-3.1.2-2]", 0, S, "100e 0006 4d5149736470 04 02 0000 0000", P, TOO_NEW),
    Bad("level 132, a mosquitto bridge", 0, S, "100c 0004 4d515454 84 02 0000 0000", P, TOO_NEW),
    Bad("reserved connect flag [MQTT-3.1.2-3]", 0, S, f"100c {MQTT4} 03 0000 0000"),
    Bad("reserved connect flag, 5.0 [MQTT-3.1.2-3]", 0, S, f"100d {MQTT5} 03 0000 00 0000"),
    Bad("will QoS without will [MQTT-3.1.2-11]", 0, S, f"100c {MQTT4} 0a 0000 0000"),
    Bad("will retain without will [MQTT-3.1.2-13]", 0, S, f"100d {MQTT5} 22 0000 00 0000"),
    Bad("will QoS 3 [MQTT-3.1.2-12]", 0, S, f"1011 {MQTT4} 1e 0000 0000 0001 61 0000"),
    Bad("password without user name, 3.1.1 [MQTT-3.1.2-22]", 0, S, f"100f {MQTT4} 42 0000 0000 0001 61"),
    Bad("client id missing [MQTT-3.1.3-3]", 0, S, f"100a {MQTT4} 02 0000"),
    Bad("client id cut off", 0, S, f"100d {MQTT4} 02 0000 0002 61"),
    Bad("client id with U+0000 [MQTT-1.5.4-2]", 0, S, f"100d {MQTT4} 02 0000 0001 00"),
    Bad("client id is a surrogate [MQTT-1.5.4-1]", 0, S, f"100f {MQTT4} 02 0000 0003 eda080"),
    Bad("client id is overlong UTF-8 [MQTT-1.5.4-1]", 0, S, f"100e {MQTT4} 02 0000 0002 c0af"),
    Bad("client id is above U+10FFFF [MQTT-1.5.4-1]", 0, S, f"1010 {MQTT4} 02 0000 0004 f4908080"),
    Bad("will announced and missing", 0, S, f"100c {MQTT4} 06 0000 0000"),
    Bad("will payload missing", 0, S, f"100f {MQTT4} 06 0000 0000 0001 61"),
    Bad("will topic with a wildcard, 4.7.1", 0, S, f"1011 {MQTT4} 06 0000 0000 0001 23 0000"),
    Bad("will topic empty [MQTT-4.7.3-1]", 0, S, f"1010 {MQTT4} 06 0000 0000 0000 0000"),
    Bad("user name announced and missing", 0, S, f"100c {MQTT4} 82 0000 0000"),
    Bad("password announced and missing", 0, S, f"100e {MQTT4} c2 0000 0000 0000"),
    Bad("user name not UTF-8 [MQTT-3.1.3-12]", 0, S, f"100f {MQTT4} 82 0000 0000 0001 ff"),
    Bad("bytes after the payload", 0, S, f"100d {MQTT4} 02 0000 0000 00"),
    Bad("5.0 without properties", 0, S, f"100a {MQTT5} 02 0000"),
    Bad("properties longer than the packet", 0, S, f"100d {MQTT5} 02 0000 05 0000"),
    Bad("receive maximum 0, 3.1.2.11.3", 0, S, f"1010 {MQTT5} 02 0000 03 210000 0000", P),
    Bad("maximum packet size 0, 3.1.2.11.4", 0, S, f"1012 {MQTT5} 02 0000 05 2700000000 0000", P),
    Bad("request problem information 2, 3.1.2.11.7", 0, S, f"100f {MQTT5} 02 0000 02 1702 0000", P),
    Bad("request response information 2, 3.1.2.11.6", 0, S, f"100f {MQTT5} 02 0000 02 1902 0000", P),
    Bad("authentication data without method, 3.1.2.11.10", 0, S, f"1011 {MQTT5} 02 0000 04 16000161 0000", P),
    Bad("session expiry twice, 3.1.2.11.2", 0, S, f"1017 {MQTT5} 02 0000 0a 1100000001 1100000001 0000", P),
    Bad("a property of PUBLISH, 2.2.2.2", 0, S, f"100f {MQTT5} 02 0000 02 0101 0000"),
    Bad("will delay among the properties of CONNECT, 2.2.2.2", 0, S, f"1012 {MQTT5} 02 0000 05 1800000001 0000"),
    Bad("session expiry among those of the will, 2.2.2.2", 0, S, f"1017 {MQTT5} 06 0000 00 0000 05 1100000001 0001 61 0000"),
    Bad("unknown property, 2.2.2.2", 0, S, f"100f {MQTT5} 02 0000 02 0000 0000"),
    Bad("user property without value", 0, S, f"1011 {MQTT5} 02 0000 04 26000161 0000"),
]

CONNACK = [
    Bad("reserved acknowledge flags [MQTT-3.2.2-1]", -4, C, "2002 0200"),
    Bad("return code 6, 3.1.1 table 3.1", -4, C, "2002 0006"),
    Bad("session present beside a refusal [MQTT-3.2.2-4], 3.1.1", -4, C, "2002 0105", P),
    Bad("session present beside a refusal [MQTT-3.2.2-6]", -5, C, "2003 01 87 00", P),
    Bad("a reason code of SUBACK [MQTT-3.2.2-8]", -5, C, "2003 00 01 00", P),
    Bad("no property length", -5, C, "2002 00 00"),
    Bad("maximum QoS 2, 3.2.2.3.4", -5, C, "2005 00 00 02 2402", P),
    Bad("retain available 2, 3.2.2.3.5", -5, C, "2005 00 00 02 2502", P),
    Bad("a byte too many, 3.1.1", -4, C, "2003 000000"),
    Bad("empty", -4, C, "2000"),
]

PUBLISH = [
    Bad("QoS 3 [MQTT-3.3.1-4]", 4, S, "3605 0001 61 0001"),
    Bad("QoS 3 with DUP and RETAIN [MQTT-3.3.1-4]", 5, S, "3f05 0001 61 0001"),
    Bad("DUP with QoS 0 [MQTT-3.3.1-2]", 4, S, "3803 0001 61"),
    Bad("DUP with QoS 0, retained [MQTT-3.3.1-2]", 5, S, "3904 0001 61 00"),
    Bad("empty body", 4, S, "3000"),
    Bad("one byte", 4, S, "3001 00"),
    Bad("topic name empty, 3.1.1 [MQTT-4.7.3-1]", 4, S, "3003 0000 61"),
    Bad("topic name empty, nothing else", 4, S, "3002 0000"),
    Bad("topic name longer than the packet", 4, S, "3004 0003 6161"),
    Bad("topic name longer than the packet by 65535", 4, S, "3204 ffff 6161"),
    Bad("topic name with # [MQTT-3.3.2-2]", 4, S, "3005 0003 612f23"),
    Bad("topic name with + [MQTT-3.3.2-2]", 5, S, "3004 0001 2b 00"),
    Bad("topic name with U+0000 [MQTT-4.7.3-2]", 4, S, "3003 0001 00"),
    Bad("topic name is a surrogate [MQTT-1.5.4-1]", 4, S, "3005 0003 edbfbf"),
    Bad("topic name not UTF-8 [MQTT-3.3.2-1]", 5, S, "3004 0001 80 00"),
    Bad("packet id missing [MQTT-2.2.1-2]", 4, S, "3203 0001 61"),
    Bad("packet id cut off [MQTT-2.2.1-2]", 4, S, "3204 0001 61 01"),
    Bad("a control character in a topic name, as mosquitto", 4, S, "3004 0002 c285"),
    Bad("packet id 0 [MQTT-2.2.1-3]", 4, S, "3205 0001 61 0000", P),
    Bad("packet id 0, QoS 2 [MQTT-2.2.1-3]", 5, S, "3406 0001 61 0000 00", P),
    Bad("no property length", 5, S, "3003 0001 61"),
    Bad("no property length, QoS 1", 5, S, "3205 0001 61 0001"),
    Bad("property length longer than the packet", 5, S, "3005 0001 61 02 01"),
    Bad("property length of five bytes", 5, S, "3009 0001 61 8080808001 00"),
    Bad("property length longer than needed [MQTT-1.5.5-1]", 5, S, "3005 0001 61 8000"),
    Bad("payload format indicator 2, 3.3.2.3.2", 5, S, "3006 0001 61 02 0102", P),
    Bad("payload format indicator twice, 3.3.2.3.2", 5, S, "3008 0001 61 04 0101 0101", P),
    Bad("message expiry cut off", 5, S, "3008 0001 61 04 02 000000"),
    Bad("topic alias 0 [MQTT-3.3.2-8]", 5, S, "3007 0001 61 03 230000", P, R.TOPIC_ALIAS_INVALID),
    Bad("topic alias above the maximum [MQTT-3.3.2-9]", 5, S, "3007 0001 61 03 23000b", P, R.TOPIC_ALIAS_INVALID),
    Bad("topic alias never set, 3.3.2.3.4", 5, S, "3006 0000 03 230001", P),
    Bad("neither topic nor alias, 3.3.2.1", 5, S, "3003 0000 00", P),
    Bad("neither topic nor alias, other properties, 3.3.2.1", 5, S, "3005 0000 02 0101", P),
    Bad("an alias for what is no topic name", 5, S, "3007 0001 23 03 230001"),
    Bad("response topic with a wildcard [MQTT-3.3.2-14]", 5, S, "3008 0001 61 04 08000123", P),
    Bad("content type not UTF-8 [MQTT-3.3.2-19]", 5, S, "3008 0001 61 04 030001ff"),
    Bad("subscription identifier from a client [MQTT-3.3.4-6]", 5, S, "3006 0001 61 02 0b01", P),
    Bad("subscription identifier 0, 3.3.2.3.8", 5, C, "3006 0001 61 02 0b00", P),
    Bad("session expiry in PUBLISH, 2.2.2.2", 5, S, "3009 0001 61 05 1100000001"),
]

ACKS = [
    Bad("PUBACK without packet id", 4, S, "4000"),
    Bad("PUBACK with half a packet id", 4, S, "4001 00"),
    Bad("PUBACK with packet id 0 [MQTT-2.2.1-3]", 4, S, "4002 0000", P),
    Bad("PUBACK with a reason code, 3.1.1", 4, S, "4003 0001 00"),
    Bad("PUBACK with a reason of PUBREL [MQTT-3.4.2-1]", 5, S, "4003 0001 92", P),
    Bad("PUBACK with an unknown reason [MQTT-3.4.2-1]", 5, S, "4003 0001 7f", P),
    Bad("PUBACK with a byte after its properties", 5, S, "4005 0001 00 00 00"),
    Bad("PUBACK with a property of CONNECT, 2.2.2.2", 5, S, "4007 0001 00 03 210001"),
    Bad("PUBACK with two reason strings, 3.4.2.2.2", 5, S, "400c 0001 00 08 1f000161 1f000161", P),
    Bad("PUBREC with packet id 0 [MQTT-2.2.1-3]", 4, S, "5002 0000", P),
    Bad("PUBREC with a reason of PUBCOMP [MQTT-3.5.2-1]", 5, S, "5003 0001 92", P),
    Bad("PUBREL with packet id 0 [MQTT-2.2.1-3]", 4, S, "6202 0000", P),
    Bad("PUBREL with a reason of PUBREC [MQTT-3.6.2-1]", 5, S, "6203 0001 97", P),
    Bad("PUBCOMP with packet id 0 [MQTT-2.2.1-3]", 5, S, "7002 0000", P),
    Bad("PUBCOMP with a reason of PUBACK [MQTT-3.7.2-1]", 5, S, "7003 0001 10", P),
    Bad("PUBCOMP too long, 3.1.1", 4, S, "7004 0001 0000"),
]

SUBSCRIBE = [
    Bad("no filter [MQTT-3.8.3-2]", 4, S, "8202 0001", P),
    Bad("no filter, 5.0 [MQTT-3.8.3-2]", 5, S, "8203 0001 00", P),
    Bad("packet id 0 [MQTT-2.2.1-3]", 4, S, "8206 0000 0001 61 00"),
    Bad("no options", 4, S, "8205 0001 0001 61"),
    Bad("filter cut off", 4, S, "8205 0001 0005 61"),
    Bad("filter empty [MQTT-4.7.3-1]", 4, S, "8205 0001 0000 00"),
    Bad("filter with U+0000 [MQTT-4.7.3-2]", 5, S, "8207 0001 00 0001 00 00"),
    Bad("filter not UTF-8 [MQTT-3.8.3-1]", 4, S, "8206 0001 0001 ff 00"),
    Bad("# not last [MQTT-4.7.1-1]", 4, S, "8208 0001 0003 232f61 00"),
    Bad("# behind a letter [MQTT-4.7.1-1]", 4, S, "8207 0001 0002 6123 00"),
    Bad("+ behind a letter [MQTT-4.7.1-2]", 5, S, "8208 0001 00 0002 612b 00"),
    Bad("a share without a filter [MQTT-4.8.2-2]", 5, S, "820e 0001 00 0008 2473686172652f67 00"),
    Bad("203 levels", 4, S, f"82cf01 0001 00ca {'2f' * 202} 00"),
    Bad("a control character in a filter, as mosquitto", 5, S, "8207 0001 00 0001 0a 00"),
    Bad("QoS 3, 3.8.3.1", 4, S, "8206 0001 0001 61 03"),
    Bad("QoS 3, 5.0, 3.8.3.1", 5, S, "8207 0001 00 0001 61 03"),
    Bad("reserved options [MQTT-3.8.3-5]", 5, S, "8207 0001 00 0001 61 40"),
    Bad("5.0's options in 3.1.1 [MQTT-3-8.3-4]", 4, S, "8206 0001 0001 61 04"),
    Bad("retain handling 3, 3.8.3.1", 5, S, "8207 0001 00 0001 61 30", P),
    Bad("no local on a share [MQTT-3.8.3-4]", 5, S, "8210 0001 00 000a 2473686172652f672f61 04", P),
    Bad("subscription identifier 0, 3.8.2.1.2", 5, S, "8209 0001 02 0b00 0001 61 00", P),
    Bad("subscription identifier twice, 3.8.2.1.2", 5, S, "820b 0001 04 0b01 0b02 0001 61 00", P),
    Bad("a reason string, 2.2.2.2", 5, S, "820b 0001 04 1f000161 0001 61 00"),
    Bad("the second filter is bad", 4, S, "820a 0001 0001 61 00 0001 62 07"),
]

OTHERS = [
    Bad("SUBACK without codes", 4, C, "9002 0001", P),
    Bad("SUBACK with code 3, 3.1.1 [MQTT-3.9.3-2]", 4, C, "9003 0001 03", P),
    Bad("SUBACK with a code of 5.0, 3.1.1 [MQTT-3.9.3-2]", 4, C, "9003 0001 87"),
    Bad("SUBACK with a reason of UNSUBACK", 5, C, "9004 0001 00 11", P),
    Bad("UNSUBSCRIBE without filter [MQTT-3.10.3-2]", 4, S, "a202 0001", P),
    Bad("UNSUBSCRIBE without filter, 5.0 [MQTT-3.10.3-2]", 5, S, "a203 0001 00", P),
    Bad("UNSUBSCRIBE with packet id 0 [MQTT-2.2.1-3]", 4, S, "a205 0000 0001 61"),
    Bad("UNSUBSCRIBE with a subscription identifier, 2.2.2.2", 5, S, "a208 0001 02 0b01 0001 61"),
    Bad("UNSUBSCRIBE with an empty filter [MQTT-4.7.3-1]", 4, S, "a204 0001 0000"),
    Bad("UNSUBACK with a code, 3.1.1", 4, C, "b003 0001 00"),
    Bad("UNSUBACK without code, 5.0", 5, C, "b003 0001 00", P),
    Bad("PINGREQ with a body", 4, S, "c001 00"),
    Bad("PINGRESP with a body", 5, C, "d001 00"),
    Bad("DISCONNECT with a body, 3.1.1", 4, S, "e001 00"),
    Bad("DISCONNECT with a reason of CONNACK [MQTT-3.14.2-1]", 5, S, "e001 85", P),
    Bad("DISCONNECT of a client: server shutting down, 3.14.2.1", 5, S, "e001 8b", P),
    Bad("DISCONNECT of a server: with will, 3.14.2.1", 5, C, "e001 04", P),
    Bad("DISCONNECT of a server with session expiry [MQTT-3.14.2-2]", 5, C, "e007 00 05 1100000001", P),
    Bad("DISCONNECT with a byte too many", 5, S, "e003 00 00 00"),
    Bad("AUTH without method, 3.15.2.2.2", 5, S, "f002 18 00", P),
    Bad("AUTH with reason and nothing else, 3.15.2.1", 5, S, "f001 18"),
    Bad("AUTH with an unknown reason [MQTT-3.15.2-1]", 5, S, "f006 01 04 15000161", P),
    Bad("AUTH of a client: success, 3.15.2.1", 5, S, "f006 00 04 15000161", P),
    Bad("AUTH of a server: re-authenticate, 3.15.2.1", 5, C, "f006 19 04 15000161", P),
]

REFUSED = FIXED_HEADER + FIRST + CONNECT + CONNACK + PUBLISH + ACKS + SUBSCRIBE + OTHERS

ACCEPTED = [
    Good("the last connect flag has no meaning in 3.1", 0, S, "100f 0006 4d5149736470 03 03 0000 0001 63"),
    Good("3.1.1 does not forbid a length longer than needed, 2.2.3", 4, S, "c0 8000"),
    Good("3.1.1 PUBLISH with such a length", 4, S, "30 8300 0001 61"),
    Good("a client id of spaces and U+FEFF [MQTT-1.5.4-3]", 0, S, f"1010 {MQTT4} 02 0000 0004 20efbbbf"),
    Good("a client id longer than 23 bytes, 3.1.3.1", 0, S, f"1028 {MQTT4} 02 0000 001c" + "61" * 28),
    Good("password without user name, 5.0", 0, S, f"1010 {MQTT5} 42 0000 00 0000 0001 61"),
    Good("an empty client id without clean session is the broker's to refuse", 0, S, f"100c {MQTT4} 00 0000 0000"),
    Good("a topic name of one slash, 4.7.3", 4, S, "3003 0001 2f"),
    Good("a topic name with $, 4.7.2", 4, S, "3006 0004 24535953"),
    Good("a payload that looks like another packet", 4, S, "3007 0001 61 c000c000"),
    Good("PUBACK with reason and no properties, 3.4.2.1", 5, S, "4003 0001 10"),
    Good("PUBACK with reason and empty properties, 3.4.2.1", 5, S, "4004 0001 00 00"),
    Good("DISCONNECT with reason and no properties, 3.14.2.2.1", 5, S, "e001 04"),
    Good("the same filter twice", 4, S, "820a 0001 0001 61 00 0001 61 01"),
    Good("user properties of the same name, 3.1.2.11.8", 0, S, f"101b {MQTT5} 02 0000 0e 26000161000131 26000161000131 0000"),
    Good("two subscription identifiers from a server, 3.3.2.3.8", 5, C, "3008 0001 61 04 0b01 0b02"),
    Good("AUTH by which the server says success, 3.15.2.1", 5, C, "f000"),
]


def end_of(case: Bad | Good) -> Connection[str]:
    """Version 0 is a server before CONNECT, a negative version a client before CONNACK."""
    return opened(case.side, case.version) if case.version > 0 else fresh(case.side, -case.version)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused(case: Bad) -> None:
    end = end_of(case)
    data = bytes.fromhex(case.wire)
    error = fault_of(end.receive(data))
    reason = case.reason or (R.PROTOCOL_ERROR if case.error is P else R.MALFORMED_PACKET)
    assert (type(error), error.reason) == (case.error, reason), str(error)
    assert end.receive(bytes.fromhex("c000")) == [], "nothing is read after a fault"


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused_byte_by_byte(case: Bad) -> None:
    data = bytes.fromhex(case.wire)
    whole = fault_of(end_of(case).receive(data))
    end = end_of(case)
    events = [event for byte in data for event in end.receive(bytes((byte,)))]
    assert str(fault_of(events)) == str(whole)


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_accepted(case: Good) -> None:
    events = end_of(case).receive(bytes.fromhex(case.wire))
    assert [type(event).__name__ for event in events if type(event).__name__ == "Fault"] == []
    assert len(events) == 1


def test_every_error_says_which_packet_and_what() -> None:
    for case in REFUSED:
        text = fault_of(end_of(case).receive(bytes.fromhex(case.wire))).text
        assert len(text) > 10 and text == text.strip(), case.id


def test_user_properties_keep_their_order_and_their_faults_their_name() -> None:
    one, two, three = b"\x26\0\1a\0\0011", b"\x26\0\1b\0\0012", b"\x26\0\1a\0\0013"
    block = one + two + b"\x11\0\0\0\x3c" + three
    found = decode_block(block, 0, len(block), "CONNECT")
    assert found == {Property.USER_PROPERTY: [("a", "1"), ("b", "2"), ("a", "3")], Property.SESSION_EXPIRY_INTERVAL: 60}
    for broken in (one + b"\x26\0\1b\0\2\xff\xff", one + two[:-1], b"\x26\0\1\0"):
        with pytest.raises(MalformedPacket, match="USER_PROPERTY"):
            decode_block(broken, 0, len(broken), "CONNECT")
