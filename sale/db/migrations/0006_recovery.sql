-- What recovery needs: a place where API processes hand in what they acknowledged, and conflicts
-- that are not of the constraints' making.

CREATE TABLE handed_in (
    campaign_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    epoch integer NOT NULL,
    at timestamptz NOT NULL,
    card_no text COLLATE "C" NOT NULL,
    key_hash text COLLATE "C" NOT NULL,
    showing_no integer NOT NULL,
    quantity integer NOT NULL CHECK (quantity > 0),
    price_fen integer NOT NULL,
    process text NOT NULL,
    handed_at timestamptz NOT NULL DEFAULT now(),
    settled text CHECK (settled IN ('stands', 'conflict')),
    PRIMARY KEY (campaign_id, seq, card_no, key_hash)
);
CREATE INDEX handed_in_unsettled ON handed_in (campaign_id, seq) WHERE settled IS NULL;
COMMENT ON TABLE handed_in IS
    'Sales that an API process has acknowledged, handed in when Redis had lost them (INV-3).';
COMMENT ON COLUMN handed_in.campaign_id IS 'The campaign.';
COMMENT ON COLUMN handed_in.seq IS 'Event number that the member was told.';
COMMENT ON COLUMN handed_in.epoch IS 'Epoch it was told in.';
COMMENT ON COLUMN handed_in.at IS 'Campaign clock of the sale.';
COMMENT ON COLUMN handed_in.card_no IS 'Buying card.';
COMMENT ON COLUMN handed_in.key_hash IS 'Hash of the idempotency key, 16 hex digits.';
COMMENT ON COLUMN handed_in.showing_no IS 'Showing it is for.';
COMMENT ON COLUMN handed_in.quantity IS 'Tickets.';
COMMENT ON COLUMN handed_in.price_fen IS 'Price of one ticket at the sale.';
COMMENT ON COLUMN handed_in.process IS 'API process that told it.';
COMMENT ON COLUMN handed_in.handed_at IS 'When it was handed in.';
COMMENT ON COLUMN handed_in.settled IS
    'stands: the ledger says the same; conflict: it does not, see conflict; null: not applied yet.';

ALTER TABLE conflict DROP CONSTRAINT conflict_pkey;
ALTER TABLE conflict ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY;
ALTER TABLE conflict ADD COLUMN source text NOT NULL DEFAULT 'refused'
    CHECK (source IN ('refused', 'forked', 'handed_in'));
ALTER TABLE conflict ADD CONSTRAINT conflict_once UNIQUE (campaign_id, seq, source, event);
CREATE TRIGGER conflict_stays BEFORE DELETE OR TRUNCATE ON conflict
    EXECUTE FUNCTION refuse_change('a conflict is never removed');
COMMENT ON TABLE conflict IS 'What was sold, or told, and does not stand as an order. None is normal.';
COMMENT ON COLUMN conflict.id IS 'Grows with every row.';
COMMENT ON COLUMN conflict.source IS
    'refused: in the ledger, but PostgreSQL refused to act on it; forked: a Redis told another '
    'story than the ledger; handed_in: an API process had acknowledged it.';
COMMENT ON COLUMN conflict.event IS 'The event as it stands in the ledger, or as it was told.';
