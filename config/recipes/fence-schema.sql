CREATE TABLE fence (name text PRIMARY KEY, epoch bigint NOT NULL);
CREATE TABLE readings (at text PRIMARY KEY, value float NOT NULL, epoch bigint NOT NULL);
