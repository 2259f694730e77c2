BEGIN;
-- Record a newer epoch. In any case this locks the row until the end of the transaction.
INSERT INTO fence (name, epoch) VALUES (:name, :epoch)
ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch WHERE fence.epoch < excluded.epoch;
-- An older epoch inserts 0 rows.
INSERT INTO readings (at, value, epoch)
SELECT :at, :value, :epoch WHERE EXISTS (SELECT 1 FROM fence WHERE name = :name AND epoch = :epoch)
ON CONFLICT (at) DO UPDATE SET value = excluded.value, epoch = excluded.epoch;
COMMIT;
