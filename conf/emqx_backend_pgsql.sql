-- The tables of the PostgreSQL backend. `tidegate uplink init pgsql.pool1` shows and creates what is missing;
-- or: psql -d mqtt -f emqx_backend_pgsql.sql
--
-- The first five are EMQX's. What is added to them: mqtt_acked.topic is 255 wide instead of 64, its mid a bigint, and mqtt_msg
-- has indexes on msgid and on (topic, id), by which messages are fetched. The tidegate_* tables are the gateway's own records;
-- without tidegate_ledger what is sent twice after a lost answer arrives twice. All times are UTC.

CREATE TABLE IF NOT EXISTS mqtt_client(
  id SERIAL8 primary key,
  clientid character varying(64),
  state integer,
  node character varying(64),
  online_at timestamp ,
  offline_at timestamp,
  created timestamp without time zone,
  UNIQUE (clientid)
);

CREATE TABLE IF NOT EXISTS mqtt_sub(
  id SERIAL8 primary key,
  clientid character varying(64),
  topic character varying(255),
  qos integer,
  created timestamp without time zone,
  UNIQUE (clientid, topic)
);

CREATE TABLE IF NOT EXISTS mqtt_msg (
  id SERIAL8 primary key,
  msgid character varying(64),
  sender character varying(64),
  topic character varying(255),
  qos integer,
  retain integer,
  payload text,
  arrived timestamp without time zone
);

CREATE INDEX IF NOT EXISTS tidegate_msgid ON mqtt_msg (msgid);

CREATE INDEX IF NOT EXISTS tidegate_topic ON mqtt_msg (topic, id);

CREATE TABLE IF NOT EXISTS mqtt_retain(
  id SERIAL8 primary key,
  topic character varying(255),
  msgid character varying(64),
  sender character varying(64),
  qos integer,
  payload text,
  arrived timestamp without time zone,
  UNIQUE (topic)
);

CREATE TABLE IF NOT EXISTS mqtt_acked (
  id SERIAL8 primary key,
  clientid character varying(64),
  topic character varying(255),
  mid bigint,
  created timestamp without time zone,
  UNIQUE (clientid, topic)
);

-- How far each gateway came: the mark moves in the transaction of what it counts. Deleting a row sends again what the
-- gateway's log still holds.
CREATE TABLE IF NOT EXISTS tidegate_ledger (
  gateway character varying(64) NOT NULL,
  epoch bigint NOT NULL,
  pool character varying(64) NOT NULL,
  seq bigint NOT NULL,
  at timestamp without time zone NOT NULL,
  PRIMARY KEY (gateway, epoch, pool)
);

-- How far a client has read a topic, for each gateway that wrote to it.
CREATE TABLE IF NOT EXISTS tidegate_position (
  clientid character varying(64) NOT NULL,
  topic character varying(255) NOT NULL,
  gateway character varying(64) NOT NULL,
  epoch bigint NOT NULL,
  seq bigint NOT NULL,
  at timestamp without time zone NOT NULL,
  PRIMARY KEY (clientid, topic, gateway)
);

-- Which event wrote a client's presence (target 'client') or a retained message ('retain'), so that an older one that comes
-- late does not overwrite it. gone_at: when its deletion was written; such a row is kept for 30 days.
CREATE TABLE IF NOT EXISTS tidegate_stamp (
  target character varying(16) NOT NULL,
  name character varying(255) NOT NULL,
  ms bigint NOT NULL,
  gateway character varying(64) NOT NULL,
  epoch bigint NOT NULL,
  seq bigint NOT NULL,
  gone_at timestamp without time zone,
  PRIMARY KEY (target, name)
);

-- What a gateway had to drop before it could be sent.
CREATE TABLE IF NOT EXISTS tidegate_gap (
  id SERIAL8 primary key,
  gateway character varying(64) NOT NULL,
  first_seq bigint NOT NULL,
  last_seq bigint NOT NULL,
  first_at timestamp without time zone NOT NULL,
  last_at timestamp without time zone NOT NULL,
  topic text NOT NULL,
  reason character varying(64) NOT NULL,
  count bigint NOT NULL
);
