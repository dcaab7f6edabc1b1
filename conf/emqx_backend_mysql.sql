-- The tables of the MySQL/MariaDB backend. `tidegate uplink init mysql.pool1` shows and creates what is missing;
-- or: mysql -u root -p mqtt < emqx_backend_mysql.sql
--
-- The first five are EMQX's. What is added to them: COLLATE utf8mb4_bin (in the default collation A/x and a/x are one topic)
-- and, in mqtt_msg, the indexes on msgid and on (topic, id), by which messages are fetched. The tidegate_* tables are the gateway's own records; without tidegate_ledger what is sent twice
-- after a lost answer arrives twice. All times are UTC.

CREATE TABLE IF NOT EXISTS `mqtt_client` (
  `id` int(11) unsigned NOT NULL AUTO_INCREMENT,
  `clientid` varchar(64) DEFAULT NULL,
  `state` varchar(3) DEFAULT NULL,
  `node` varchar(64) DEFAULT NULL,
  `online_at` datetime DEFAULT NULL,
  `offline_at` datetime DEFAULT NULL,
  `created` timestamp NULL DEFAULT CURRENT_TIMESTAMP,
  PRIMARY KEY (`id`),
  KEY `mqtt_client_idx` (`clientid`),
  UNIQUE KEY `mqtt_client_key` (`clientid`),
  INDEX topic_index(`id`, `clientid`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

CREATE TABLE IF NOT EXISTS `mqtt_sub` (
  `id` int(11) unsigned NOT NULL AUTO_INCREMENT,
  `clientid` varchar(64) DEFAULT NULL,
  `topic` varchar(180) DEFAULT NULL,
  `qos` tinyint(1) DEFAULT NULL,
  `created` timestamp NULL DEFAULT CURRENT_TIMESTAMP,
  PRIMARY KEY (`id`),
  KEY `mqtt_sub_idx` (`clientid`,`topic`,`qos`),
  UNIQUE KEY `mqtt_sub_key` (`clientid`,`topic`),
  INDEX topic_index(`id`, `topic`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

CREATE TABLE IF NOT EXISTS `mqtt_msg` (
  `id` int(11) unsigned NOT NULL AUTO_INCREMENT,
  `msgid` varchar(64) DEFAULT NULL,
  `topic` varchar(180) NOT NULL,
  `sender` varchar(64) DEFAULT NULL,
  `node` varchar(64) DEFAULT NULL,
  `qos` tinyint(1) NOT NULL DEFAULT '0',
  `retain` tinyint(1) DEFAULT NULL,
  `payload` blob,
  `arrived` datetime NOT NULL,
  PRIMARY KEY (`id`),
  KEY `tidegate_msgid` (`msgid`),
  KEY `tidegate_topic` (`topic`, `id`),
  INDEX topic_index(`id`, `topic`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

CREATE TABLE IF NOT EXISTS `mqtt_retain` (
  `id` int(11) unsigned NOT NULL AUTO_INCREMENT,
  `topic` varchar(180) DEFAULT NULL,
  `msgid` varchar(64) DEFAULT NULL,
  `sender` varchar(64) DEFAULT NULL,
  `node` varchar(64) DEFAULT NULL,
  `qos` tinyint(1) DEFAULT NULL,
  `payload` blob,
  `arrived` timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP,
  PRIMARY KEY (`id`),
  UNIQUE KEY `mqtt_retain_key` (`topic`),
  INDEX topic_index(`id`, `topic`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

CREATE TABLE IF NOT EXISTS `mqtt_acked` (
  `id` int(11) unsigned NOT NULL AUTO_INCREMENT,
  `clientid` varchar(64) DEFAULT NULL,
  `topic` varchar(180) DEFAULT NULL,
  `mid` int(11) unsigned DEFAULT NULL,
  `created` timestamp NULL DEFAULT NULL,
  PRIMARY KEY (`id`),
  UNIQUE KEY `mqtt_acked_key` (`clientid`,`topic`),
  INDEX topic_index(`id`, `topic`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

-- How far each gateway came: the mark moves in the transaction of what it counts. Deleting a row sends again what the
-- gateway's log still holds.
CREATE TABLE IF NOT EXISTS `tidegate_ledger` (
  `gateway` varchar(64) NOT NULL,
  `epoch` bigint NOT NULL,
  `pool` varchar(64) NOT NULL,
  `seq` bigint NOT NULL,
  `at` datetime NOT NULL,
  PRIMARY KEY (`gateway`, `epoch`, `pool`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

-- How far a client has read a topic, for each gateway that wrote to it.
CREATE TABLE IF NOT EXISTS `tidegate_position` (
  `clientid` varchar(64) NOT NULL,
  `topic` varchar(255) NOT NULL,
  `gateway` varchar(64) NOT NULL,
  `epoch` bigint NOT NULL,
  `seq` bigint NOT NULL,
  `at` datetime NOT NULL,
  PRIMARY KEY (`clientid`, `topic`, `gateway`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

-- Which event wrote a client's presence (target 'client') or a retained message ('retain'), so that an older one that comes
-- late does not overwrite it. `gone_at`: when its deletion was written; such a row is kept for 30 days.
CREATE TABLE IF NOT EXISTS `tidegate_stamp` (
  `target` varchar(16) NOT NULL,
  `name` varchar(255) NOT NULL,
  `ms` bigint NOT NULL,
  `gateway` varchar(64) NOT NULL,
  `epoch` bigint NOT NULL,
  `seq` bigint NOT NULL,
  `gone_at` datetime DEFAULT NULL,
  PRIMARY KEY (`target`, `name`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;

-- What a gateway had to drop before it could be sent.
CREATE TABLE IF NOT EXISTS `tidegate_gap` (
  `id` bigint NOT NULL AUTO_INCREMENT,
  `gateway` varchar(64) NOT NULL,
  `first_seq` bigint NOT NULL,
  `last_seq` bigint NOT NULL,
  `first_at` datetime NOT NULL,
  `last_at` datetime NOT NULL,
  `topic` text NOT NULL,
  `reason` varchar(64) NOT NULL,
  `count` bigint NOT NULL,
  PRIMARY KEY (`id`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin;
