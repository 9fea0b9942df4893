-- Rehearsals: campaigns that copy a real one, are sold to made-up cards alone, and go away again.
-- What may never be removed may be removed of a rehearsal that was struck off, and of nothing else.
-- Its row in campaign stays, so that its numbers are never used again and a writer that wakes up
-- late with its events in hand finds another position.

ALTER TABLE campaign ADD COLUMN rehearsal_of text COLLATE "C" NOT NULL
    GENERATED ALWAYS AS (coalesce(config ->> 'rehearsal_of', '')) STORED;
ALTER TABLE campaign ADD COLUMN purged_at timestamptz
    CONSTRAINT campaign_purged_is_rehearsal CHECK (
        purged_at IS NULL OR (rehearsal_of <> '' AND state = 'deleted'));
COMMENT ON COLUMN campaign.rehearsal_of IS 'The campaign that this one rehearses; empty: a real one.';
COMMENT ON COLUMN campaign.purged_at IS 'When a rehearsal was struck off; then its data goes away.';

CREATE TRIGGER campaign_stays_what_it_is BEFORE UPDATE OF config ON campaign FOR EACH ROW
    WHEN (OLD.config <> '{}'
          AND (NEW.config = '{}'
               OR coalesce(OLD.config ->> 'rehearsal_of', '')
                  <> coalesce(NEW.config ->> 'rehearsal_of', '')))
    EXECUTE FUNCTION refuse_change('a rehearsal stays one, and nothing else becomes one');
CREATE TRIGGER campaign_stays_purged BEFORE UPDATE ON campaign FOR EACH ROW
    WHEN (OLD.purged_at IS NOT NULL)
    EXECUTE FUNCTION refuse_change('this rehearsal is gone');

CREATE FUNCTION refuse_removal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM campaign
               WHERE campaign_id = OLD.campaign_id AND purged_at IS NOT NULL) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION '%: %', TG_TABLE_NAME, TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END $$;
COMMENT ON FUNCTION refuse_removal IS
    'Refuses to remove a row, but of a rehearsal that was struck off, in the words of the trigger.';

DROP TRIGGER event_never_changes ON event;
CREATE TRIGGER event_never_changes BEFORE UPDATE OR TRUNCATE ON event
    EXECUTE FUNCTION refuse_change('the ledger is only ever added to');
CREATE TRIGGER event_stays BEFORE DELETE ON event FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('the ledger is only ever added to');

DROP TRIGGER orders_stay ON orders;
CREATE TRIGGER orders_stay BEFORE DELETE ON orders FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('an order is never removed');
CREATE TRIGGER orders_are_never_emptied BEFORE TRUNCATE ON orders
    EXECUTE FUNCTION refuse_change('an order is never removed');

DROP TRIGGER conflict_stays ON conflict;
CREATE TRIGGER conflict_stays BEFORE DELETE ON conflict FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('a conflict is never removed');
CREATE TRIGGER conflict_is_never_emptied BEFORE TRUNCATE ON conflict
    EXECUTE FUNCTION refuse_change('a conflict is never removed');

DROP TRIGGER showing_with_sales_stays ON showing;
CREATE TRIGGER showing_with_sales_stays BEFORE DELETE ON showing FOR EACH ROW
    WHEN (OLD.live <> 0)
    EXECUTE FUNCTION refuse_removal('tickets of it are sold');

DROP TRIGGER card_use_is_derived ON card_use;
CREATE TRIGGER card_use_is_derived BEFORE INSERT OR UPDATE ON card_use FOR EACH STATEMENT
    WHEN (pg_trigger_depth() = 0)
    EXECUTE FUNCTION refuse_change('live is kept by the orders');
CREATE TRIGGER card_use_stays BEFORE DELETE ON card_use FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('live is kept by the orders');

-- Cards that are there already are not looked at: the engine's own check keeps such a one apart.
ALTER TABLE card ADD CONSTRAINT card_no_is_not_made_up CHECK (card_no !~ '^0000') NOT VALID;
